"""Make a folder of BlinkDL's `.pth` of RWKV-6 or RWKV-7, or a `.pth` of a folder.

    python -m stages.convert_rwkv MODEL.pth out/models/rwkv tokenizer=FOLDER
    python -m stages.convert_rwkv RUN/epoch_1 out/epoch_1.pth

In: the file, and a folder whose tokenizer has no more tokens than it; or a folder of RWKV. Out: a
Hugging Face folder that trains and generates here; or the file, which has the learned state of an
epoch as blocks.N.att.time_state, where the official runtime and RWKV's trainers look for it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from speechfuse import artifact, config, failures
from speechfuse.config import key


@dataclass
class ConvertRwkv:
    path: str = key("a .pth, or a folder of RWKV")
    out: str = key("the folder, or the .pth")
    tokenizer: str | None = key("of a .pth: folder whose tokenizer it is to have", None)
    fresh: bool = key("move an artifact that differs aside", False)


def main(job: ConvertRwkv) -> None:
    path, out = Path(job.path), Path(job.out)
    if not path.exists():
        raise FileNotFoundError(f"path={path} is not there")
    from safetensors.torch import save_file

    from speechfuse.fusion import folder
    from speechfuse.rwkv import pth
    from speechfuse.rwkv.hugging_face import Rwkv67Config
    from speechfuse.tokens import weights
    from speechfuse.tokens.vocabulary import Vocabulary, read_config

    if path.is_dir():
        if read_config(path).get("model_type") != pth.MODEL_TYPE:
            raise ValueError(f"{path} is no RWKV")
        if out.exists() and not job.fresh:
            raise ValueError(f"{out} exists: choose another name, or fresh=true")
        with artifact.replacing(out) as temporary:
            pth.write(temporary, weights.read(path) | folder.state_of(path))
        print(f"{out}: written, with{'' if folder.state_of(path) else 'out'} a learned state")
        return
    if job.tokenizer is None:
        raise ValueError("tokenizer: name a folder whose tokenizer the model has")
    shape, tensors = pth.read(path)
    words = Vocabulary.load(Path(job.tokenizer)).tokenizer
    if len(words) > shape.vocab_size:
        raise ValueError(f"{path} has {shape.vocab_size} tokens, and {job.tokenizer} {len(words)}")
    if any(map(pth.is_state, tensors)):
        raise ValueError(f"{path} has a learned state: take the file that it was trained from")
    inputs = {"path": artifact.sha256_of(path), "tokenizer": words.backend_tokenizer.to_str()}
    work = artifact.Artifact(out, "convert_rwkv", 1, asdict(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with failures.writing(out):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        words.save_pretrained(out)
        dtype = str(tensors["emb.weight"].dtype).removeprefix("torch.")
        Rwkv67Config(**asdict(shape), **ids, dtype=dtype).save_pretrained(out)
    outputs = sorted(p for p in out.iterdir() if p.name[0] != "." and p.name != "plan.json")
    work.finish({"parameters": sum(t.numel() for t in tensors.values())}, outputs)
    print(f"{out}: RWKV-{shape.version}, {len(words)} tokens")


if __name__ == "__main__":
    config.main(main, ConvertRwkv, __doc__, ("path", "out"))
