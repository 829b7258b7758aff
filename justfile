# speechfuse: every verb. `just recipe=NAME ranks=N VERB key=value ...`
set positional-arguments
set shell := ["bash", "-cu"]
# empty, so that Python keeps what it compiles even where the variable is set: pip compiles nothing, and each job of a verb would
# compile thousands of files again
export PYTHONDONTWRITEBYTECODE := ""

recipe := "demo"
ranks := "1"
python := ".venv/bin/python"
train := quote(python) + " -m stages.train"
on := if ranks == "1" { "" } else { quote("runtime.ranks=" + ranks) }
r := quote("recipes/" + recipe)
gate := "true"
with_ranks := r + " " + quote("ranks=" + ranks)
with_gate := with_ranks + " " + quote("gate=" + gate)
py := quote(python)
verb := py + " recipes/verbs.py"

# list the verbs
default:
    @just --list --unsorted

# make .venv with the pinned dependencies (a no-op when it is up to date; Python compiles what is used, when it is used); of another Python: just setup /path/to/python3.12
setup python3="python3":
    @same() { cmp -s pyproject.toml .venv/pyproject.toml && cmp -s constraints.txt .venv/constraints.txt; }; \
    same || ( \
      if ! "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
        echo "error: $1: $("$1" -V 2>/dev/null || echo does not run); Python 3.11, 3.12 or 3.13 is needed: just setup /path/to/python3.12" >&2; exit 2; fi; \
      exec 9>.venv.lock; : it ends with this shell, also when that is killed; \
      "$1" -c 'import fcntl; fcntl.flock(9, 6)' 2>/dev/null || { echo "waiting for another just setup"; "$1" -c 'import fcntl; fcntl.flock(9, 2)'; }; \
      same || ( "$1" -m venv .venv && {{py}} -m pip install --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
      cp pyproject.toml constraints.txt .venv/ ) )

# the whole road on the embedded default: speech in, table of scores out (out/demo/report.md)
demo *args: setup
    @{{verb}} demo {{with_gate}} "$@"

# the original's plain stage 2 beside it: no text replay, no transcript in the target
demo-plain *args: setup
    @{{verb}} demo-plain {{with_gate}} "$@"

# two more seeds of stages 1 and 2, and how far the scores spread
demo-seeds *args: setup
    @{{verb}} demo-seeds {{with_gate}} "$@"

# every kind of sample in stage 2 of the demo: refusals, conversations, noise; and the same without the noise (out/demo_robust/report.md)
demo-robust *args: setup
    @{{verb}} demo-robust {{with_gate}} "$@"

# a model that listens while it speaks: sessions, training, what it does in time and what is heard of it (out/duplex/report.md)
demo-duplex *args: setup
    @{{verb}} demo-duplex {{with_gate}} "$@"

# every way of fusing speech into the demo's base model, in one table (out/compare/compare.html)
compare *args: setup
    @{{verb}} compare {{with_gate}} "$@"

# the text of the demo's world, then speech to codes (training and test)
data *args: setup
    @{{verb}} data {{r}} "$@"

# speech to codes: just tokenize recipes/NAME/tokenize_train.yaml key=value ...
tokenize *args: setup
    {{py}} -m stages.tokenize_speech "$@"

# speech to frames, for a model that takes those: just encode recipes/NAME/encode_train.yaml key=value ...
encode *args: setup
    {{python}} -m stages.encode_speech "$@"

# what a Whisper hears, for a cascade to read: just recognize recipes/NAME/recognize_test.yaml key=value ...
recognize *args: setup
    {{py}} -m stages.recognize_speech "$@"

# hear what a codec leaves of a recording: just resynthesize FILE.wav [codec.checkpoint=out/models/codec out=FILE]
resynthesize *args: setup
    {{py}} -m stages.resynthesize {{r}}/resynthesize.yaml "$@"

# the codec of an agent's voice, and its replies as codes
fit-codec *args: setup
    {{py}} -m stages.fit_codec {{r}}/fit_codec.yaml "$@"

# sessions of two channels in time: just build-duplex recipes/NAME/duplex_train.yaml key=value ...
build-duplex *args: setup
    {{py}} -m stages.build_duplex "$@"

# talk to a model of two channels: just duplex FILE.wav
duplex *args: setup
    {{py}} -m stages.duplex {{r}}/duplex.yaml "$@"

# instruction text to spoken training data: choose and clean the text, then speak it
synthesize *args: setup
    @{{verb}} synthesize {{r}} "$@"

# hear a spoken dataset: a page with samples of every kind and their audio: just listen out/data/NAME
listen *args: setup
    {{py}} -m stages.listen "$@"

# check a finished artifact against its manifest: just verify out/data/NAME
verify *args: setup
    {{py}} -m stages.verify "$@"

# look at a dataset's codes: hours, use, entropy, lengths, rejects, plots: just inspect out/data/NAME
inspect *args: setup
    {{py}} -m stages.inspect_dataset "$@"

# put a finished dataset or model on the Hub: just push NAME [repo=OWNER/NAME private=false dry_run=true]
push *args: setup
    {{py}} -m stages.push_to_hub "$@"

# one of OpenAI's Whisper checkpoints, to models/NAME.pt: just fetch-whisper tiny.en [out=models]
fetch-whisper *args: setup
    {{py}} -m stages.fetch_whisper "$@"

# give the base model its sound tokens
expand *args: setup
    {{py}} -m stages.expand_vocab {{r}}/expand_vocab.yaml "$@"

# stage 1: next-token training on speech
stage1 *args: setup
    {{train}} {{r}}/stage1.yaml {{on}} "$@"

# stage 2: spoken instructions, transcription, text replay; first what stage 1 left must pass the gate (gate=false: unasked)
stage2 *args: setup
    @{{verb}} stage2 {{with_gate}} "$@"

# one training, of any name: just train recipes/NAME/RUN.yaml key=value ...
train *args: setup
    {{train}} "$@" {{on}}

# which row spoiled a step: just bisect-batch recipes/NAME/stage2.yaml 123
bisect-batch *args: setup
    {{py}} -m stages.bisect_batch "$@"

# score every epoch on every task, then the report: just recipe=NAME sweep [only=[stage2] limit=100 out=out/NAME/evals --dry-run]
sweep *args: setup
    @{{verb}} sweep {{r}} "$@"

# score the checkpoints: text multiple choice, spoken questions, transcription
evaluate *args: setup
    {{py}} -m stages.evaluate {{r}}/evaluate.yaml "$@"

# table, plots, page and the chosen epoch from the scores
report *args: setup
    {{py}} -m stages.report {{r}}/report.yaml "$@"

# whether a checkpoint is good enough for the next stage
gate *args: setup
    {{py}} -m stages.gate {{r}}/gate.yaml "$@"

# AudioBench's word error rate of a file of {"reference", "prediction"} lines: just score-wer FILE.jsonl
score-wer *args: setup
    {{py}} -m stages.score_wer "$@"

# answer a spoken question with the best epoch: just ask FILE.wav
ask *args: setup
    {{py}} -m stages.ask {{r}}/ask.yaml "$@"

# serve OpenAI's protocol and a page to talk to the model: just serve [port=8123 checkpoint=FOLDER]
serve *args: setup
    {{py}} -m stages.serve {{r}}/serve.yaml "$@"

# talk to the model in a browser: just talk
talk *args: setup
    {{py}} -m stages.serve {{r}}/serve.yaml open=true "$@"

# the model for llama.cpp, by its own converter: just export gguf [checkpoint=FOLDER out=FILE.gguf converter=llama.cpp/convert_hf_to_gguf.py]
export *args: setup
    {{py}} -m stages.export {{r}}/export.yaml "$@"

# what a Whisper hears, offline: just transcribe FILE... [whisper=models/tiny.en.pt quantizer=FOLDER]
transcribe *args: setup
    {{py}} -m stages.transcribe "$@"

# make a wav to ask with: just say "what is three plus four" [out.wav]
say *args: setup
    {{py}} recipes/demo/say.py {{r}}/say.yaml "$@"

# train the demo's quantizer again (30 minutes on one core)
train-quantizer *args: setup
    @{{verb}} train-quantizer {{r}} "$@"

# train the demo's base model again (about 6 minutes on 2 cores)
train-base *args: setup
    @{{verb}} train-base {{with_ranks}} "$@"

# train the demo's RWKV base model again (about 6 minutes on one core)
train-rwkv *args: setup
    @{{verb}} train-rwkv {{with_ranks}} "$@"

# show that a promise holds: just prove demo | talk | tokenize | synthesize | quantizer | resume | losses | preflight | pythons | artifact | faults | interrupts | fuzz
prove what: setup
    @test -f "tests/prove_$1.py" || (echo "error: there is no $1 to prove; choose" $(cd tests; ls prove_*.py | sed 's/prove_//; s/.py//') >&2; exit 2)
    PYTHONPATH=. {{py}} "tests/prove_$1.py"

# measure speed: just bench tokenize [key=value ...]
bench what *args: setup
    @test -f "tests/bench_$1.py" || (echo "error: there is no $1 to bench; choose" $(cd tests; ls bench_*.py | sed 's/bench_//; s/.py//') >&2; exit 2)
    PYTHONPATH=. {{py}} "tests/bench_$1.py" "${@:2}"

# dist/gpu: what to copy to a machine with a GPU and no network, where `python3 run.py` measures for 8 minutes (at most 55 MB)
gpu-bundle: setup
    PYTHONPATH=. {{python}} tests/gpu_bundle.py

# all tests (about 8 minutes on 2 cores)
test *args: setup
    OMP_NUM_THREADS=1 {{py}} -m pytest -n 2 --dist loadfile "$@"

# WhisperSpeech in an environment of its own, .venv-whisperspeech (7 GB; a no-op when it is up to date)
setup-whisperspeech:
    @cmp -s requirements-whisperspeech.txt .venv-whisperspeech/requirements.txt || ( \
      python3 -m venv .venv-whisperspeech && .venv-whisperspeech/bin/python -m pip install --disable-pip-version-check -r requirements-whisperspeech.txt && \
      cp requirements-whisperspeech.txt .venv-whisperspeech/requirements.txt )

# piper and its voice joe in an environment of its own, .venv-piper (a no-op when it is up to date): a voice to measure with
setup-piper:
    @cmp -s requirements-piper.txt .venv-piper/requirements.txt || ( \
      python3 -m venv .venv-piper && .venv-piper/bin/python -m pip install --disable-pip-version-check --only-binary :all: -r requirements-piper.txt && \
      cp requirements-piper.txt .venv-piper/requirements.txt )

# WhisperSpeech's two routes, on its genuine classes with small random weights (skipped by `just test` without its environment)
test-whisperspeech *args: setup setup-whisperspeech
    OMP_NUM_THREADS=1 {{py}} -m pytest tests/test_whisperspeech_env.py "$@"

# lint and types
check: setup
    .venv/bin/ruff check . && .venv/bin/mypy
