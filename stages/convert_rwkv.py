"""Make a folder of BlinkDL's `.pth` of RWKV-6 or RWKV-7, or a `.pth` of a folder; or a folder that
hears of what RWKV-ASR publishes.

    python -m stages.convert_rwkv MODEL.pth out/models/rwkv tokenizer=FOLDER
    python -m stages.convert_rwkv RUN/epoch_1 out/epoch_1.pth
    python -m stages.convert_rwkv rwkv-adapter-N.pth out/models/asr base=out/models/rwkv \\
        encoder._component_=speechfuse.quantizer.of_wavlm encoder.checkpoint=FOLDER

In: the file, and a folder whose tokenizer has no more tokens than it; or a folder of RWKV; or an
adapter with an initial state, its language model and its encoder. Out: a Hugging Face folder that
trains and generates here; or the file, which has the learned state of an epoch as
blocks.N.att.time_state, where the official runtime and RWKV's trainers look for it; or a folder as
an epoch is.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from speechfuse import artifact, config, failures, provenance
from speechfuse.config import key

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class ConvertRwkv:
    path: str = key("a .pth, or a folder of RWKV")
    out: str = key("the folder, or the .pth")
    tokenizer: str | None = key("of a .pth: folder whose tokenizer it is to have", None)
    base: str | None = key("of an rwkv-adapter-N.pth: folder of its language model", None)
    encoder: dict[str, Any] = key("of the same: the one of speechfuse.quantizer it hears by", {})
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
    if job.base:
        add_speech(job, Path(job.base))
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
    work = artifact.Artifact(out, "convert_rwkv", 1, settings(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    with failures.writing(out):
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
        words.save_pretrained(out)
        dtype = str(tensors["emb.weight"].dtype).removeprefix("torch.")
        Rwkv67Config(**asdict(shape), **ids, dtype=dtype).save_pretrained(out)
    finish(work, tensors.values(), f"RWKV-{shape.version}, {len(words)} tokens")


def add_speech(job: ConvertRwkv, base: Path) -> None:
    """Make the folder of a language model with what RWKV-ASR trained beside it."""
    from speechfuse.fusion import folder, rwkv_asr
    from speechfuse.quantizer.spec import EncoderSpec
    from speechfuse.rwkv.model import Shape
    from speechfuse.tokens.vocabulary import read_config

    if not job.encoder:
        raise ValueError("encoder: name the one whose frames the adapter takes")
    path, out, encoder = Path(job.path), Path(job.out), EncoderSpec(job.encoder).load("cpu")
    sizes = read_config(base)
    shape = Shape(**{each.name: sizes[each.name] for each in fields(Shape)})
    adapter, tensors, state = rwkv_asr.read(path, shape, encoder.width)
    inputs = {"path": artifact.sha256_of(path), "base": artifact.fingerprint_of(base)}
    work = artifact.Artifact(out, "convert_rwkv", 1, settings(job), inputs)
    if not work.begin(fresh=job.fresh):
        return
    speech = {"generator": "speechfuse.evals.SpliceGenerator", "adapter": adapter}
    speech |= {"encoder": encoder.identity, "base": provenance.portable(str(base))}
    with failures.writing(out):
        folder.write(out, base, speech, tensors, None, state)
    finish(work, [*tensors.values(), *state.values()], "adapter and learned state")


def settings(job: ConvertRwkv) -> dict[str, Any]:
    """Return what was given, so that what was made before there was a key keeps its fingerprint."""
    return {name: value for name, value in asdict(job).items() if value not in (None, {})}


def finish(work: artifact.Artifact, tensors: Iterable["Tensor"], what: str) -> None:
    """Write the manifest, and say `what` was written."""
    outputs = (p for p in work.out.iterdir() if p.name[0] != "." and p.name != "plan.json")
    work.finish({"parameters": sum(t.numel() for t in tensors)}, sorted(outputs))
    print(f"{work.out}: {what}")


if __name__ == "__main__":
    config.main(main, ConvertRwkv, __doc__, ("path", "out"))
