"""Configuration of the server (stages.serve)."""

from dataclasses import dataclass
from typing import Any

from speechfuse.config import key


@dataclass
class Serve:
    report: str = key("report.json, which names the chosen checkpoint; its folder has the others")
    quantizer: str = key("folder of ours, or a published WhisperVQ .model file")
    whisper: str | None = key("openai-whisper .pt beside a .model", None)
    window: float | None = key("seconds that the .pt's encoder was cut to", None, above=0)
    encoder: dict[str, Any] = key(
        "of speechfuse.quantizer, for a checkpoint that takes frames of another than quantizer",
        {},
    )
    checkpoint: str | None = key("this one instead of the chosen", None)
    repeat_first: bool = key("it was trained to repeat the question on the first line", False)
    transcribe: str = key("words before the audio that is to be transcribed, as trained", "")
    max_new_tokens: int = key("longest reply that asks for no other limit", 64, least=1)
    examples: list[str] = key("questions that the page can ask, spoken by espeak-ng", [])
    voice: str = key("espeak-ng language+variant that speaks them", "en-us+Annie")
    engine: dict[str, Any] = key(
        "what answers many at once", {"_component_": "speechfuse.serve.Engine", "rows": 16}
    )
    host: str = key("address to listen at", "127.0.0.1")
    port: int = key("port to listen at; 0: any that is free", 8123, least=0, most=65535)
    hosts: list[str] = key("further names by which it may be addressed", [])
    key_variable: str = key("environment variable with the key, asked for if set", "SPEECHFUSE_KEY")
    tls_cert: str | None = key("certificate of https, PEM", None)
    tls_key: str | None = key("its private key, PEM", None)
    open: bool = key("open the page in a browser", False)
    models: int = key("checkpoints in memory", 2, least=1)
    queue: int = key("requests that are taken at once, others get a 429", 64, least=1)
    seconds: float = key("longest clip", 60.0, above=0)
    megabytes: int = key("largest request", 32, least=1)
