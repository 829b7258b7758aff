"""Small WhisperSpeech models with random weights, on its genuine classes; needs its environment.

    .venv-whisperspeech/bin/python tests/make_whisperspeech.py FOLDER

In: FOLDER/codebook.json, rows of a quantizer's codebook, the last one its mask; the first numbers
of its rows decide (see below). Out: FOLDER/t2s.model (whose codebook it is), s2a.model and vocos/,
in the published formats, and ecapa.ckpt. Utterances end after some 35 codes.
"""

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import torch
import yaml
from encodec import EncodecModel
from vocos import Vocos
from whisperspeech import s2a_delar_mup_wds_mlang as s2a
from whisperspeech import t2s_up_wds_mlang_enclm as t2s

ENGINES = Path(__file__).parent.parent / "pipeline/speechfuse/synthesis/engines"
SPEAKERS = ENGINES / "whisperspeech_speakers.py"
TEXT, TOKENS, ACOUSTIC = 80, 150, 450  # bytes; codes (6 s) and acoustic codes of a window
SIZE = {"depth": 2, "n_head": 3, "head_width": 16, "ffn_mult": 1}


def save(path: Path, model: torch.nn.Module, config: dict) -> None:
    # save_model of whisperspeech 0.8.9 fails with today's fastcore; its load_model reads this
    tunables = dataclasses.asdict(model.tunables)
    torch.save({"config": config, "tunables": tunables, "state_dict": model.state_dict()}, path)


def loud(model: torch.nn.Module) -> None:
    """Matrices of such size that what goes in can be told from what comes out."""
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.normal_(std=0.4)


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(0)
    codebook = torch.tensor(json.loads((folder / "codebook.json").read_text()))
    rows, width = codebook.shape

    shape = {
        "ttoks_len": TEXT,
        "ttoks_codes": 256,
        "stoks_len": TOKENS,
        "stoks_codes": rows,
        "stoks_width": width,
        **SIZE,
    }
    model = t2s.TSARTransformer(**shape)
    loud(model)
    embedding = model.embeddings.embedding
    embedding.set_frozen_embeddings(codebook)
    embedding.special.weight.zero_()
    # the end's logit is 0; to that of a code its row's first number is added, times 0.4
    embedding.hidden_to_emb.weight *= 0.4
    embedding.hidden_to_emb.bias.zero_()
    embedding.hidden_to_emb.bias[0] = 0.4 / model.tunables.output_mult
    save(folder / "t2s.model", model, shape)

    shape = {
        "ctx_n": ACOUSTIC,
        "stoks_len": TOKENS,
        "stoks_codes": rows,
        "stoks_width": width,
        "spk_width": 192,
        "quantizers": 4,
        **SIZE,
    }
    acoustic = s2a.SADelARTransformer(**shape)
    loud(acoustic)
    for each in acoustic.embds.embeddings:
        each.special.weight.zero_()
    save(folder / "s2a.model", acoustic, shape)

    fetched = EncodecModel.encodec_model_24khz
    EncodecModel.encodec_model_24khz = staticmethod(lambda pretrained: fetched(pretrained=False))
    vocos = folder / "vocos"
    vocos.mkdir()
    parts = {
        "feature_extractor": ("feature_extractors.EncodecFeatures", {}),
        "backbone": (
            "models.VocosBackbone",
            {
                "input_channels": 128,
                "dim": 16,
                "intermediate_dim": 32,
                "num_layers": 1,
                "adanorm_num_embeddings": 4,
            },
        ),
        "head": ("heads.ISTFTHead", {"dim": 16, "n_fft": 1280, "hop_length": 320}),
    }
    about = {k: {"class_path": f"vocos.{p}", "init_args": a} for k, (p, a) in parts.items()}
    (vocos / "config.yaml").write_text(yaml.safe_dump(about))
    whole = Vocos.from_hparams(str(vocos / "config.yaml"))
    whole.feature_extractor.codebook_weights.normal_()
    state = {k: v for k, v in whole.state_dict().items() if ".encodec." not in k}
    torch.save(state, vocos / "pytorch_model.bin")

    torch.save(runpy.run_path(str(SPEAKERS))["model"]().state_dict(), folder / "ecapa.ckpt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
