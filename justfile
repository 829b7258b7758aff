# speechfuse: every verb. `just recipe=NAME ranks=N VERB key=value ...`
set positional-arguments
set shell := ["bash", "-cu"]

recipe := "demo"
ranks := "1"
python := ".venv/bin/python"
train := python + " -m stages.train"
on := if ranks == "1" { "" } else { "runtime.ranks=" + ranks }
r := "recipes/" + recipe
gate := "true"

# list the verbs
default:
    @just --list --unsorted

# make .venv with the pinned dependencies (a no-op when it is up to date); of another Python: just setup /path/to/python3.12
setup python3="python3":
    @cmp -s pyproject.toml .venv/pyproject.toml && cmp -s constraints.txt .venv/constraints.txt || ( \
      if ! {{quote(python3)}} -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
        echo "error: {{python3}}: $({{quote(python3)}} -V 2>/dev/null || echo does not run); Python 3.11, 3.12 or 3.13 is needed: just setup /path/to/python3.12" >&2; exit 2; fi; \
      {{quote(python3)}} -m venv .venv && {{python}} -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' && \
      cp pyproject.toml constraints.txt .venv/ )

# the whole road on the embedded default: speech in, table of scores out (out/demo/report.md)
demo: setup data expand stage1 stage2 sweep

# the original's plain stage 2 beside it: no text replay, no transcript in the target
demo-plain: demo
    {{train}} recipes/demo/stage2_plain.yaml {{on}}
    {{python}} -m stages.evaluate recipes/demo/evaluate_plain.yaml
    {{python}} -m stages.report recipes/demo/report.yaml

# two more seeds of stages 1 and 2, and how far the scores spread
demo-seeds: demo
    for s in 1 2; do \
      {{train}} recipes/demo/stage1.yaml {{on}} seed=$s out=out/demo_$s/stage1 && \
      {{train}} recipes/demo/stage2.yaml {{on}} seed=$s out=out/demo_$s/stage2 checkpoint=out/demo_$s/stage1/epoch_0 && \
      {{python}} -m stages.evaluate recipes/demo/evaluate.yaml out=out/demo_$s/evals checkpoints.2.path=out/demo_$s/stage1 checkpoints.3.path=out/demo_$s/stage2 && \
      {{python}} -m stages.report recipes/demo/report.yaml out=out/demo_$s evals=out/demo_$s/evals runs.0.path=out/demo_$s/stage1 runs.1.path=out/demo_$s/stage2 || exit 1; \
    done
    {{python}} recipes/demo/seed_variance.py recipes/demo/seed_variance.yaml

# every kind of sample in stage 2 of the demo: refusals, conversations, noise; and the same without the noise (out/demo_robust/report.md)
demo-robust: demo synthesize
    {{python}} -m stages.curate_texts {{r}}/curate_test.yaml
    {{python}} -m stages.synthesize_instructions {{r}}/synthesize_test.yaml out=out/data/instructions_test/clean augmentation=[]
    for snr in 20 10 5 0; do \
      {{python}} -m stages.synthesize_instructions {{r}}/synthesize_test.yaml out=out/data/instructions_test/$snr augmentation.0.snr=[$snr,$snr] || exit 1; \
    done
    {{python}} -m stages.synthesize_instructions {{r}}/synthesize.yaml out=out/data/instructions_quiet "augmentation=[{_component_: speechfuse.audio.Noise, snr: [20, 40], sources: [white]}, {_component_: speechfuse.audio.Gain, db: [-10, 0]}]"
    {{train}} {{r}}/stage2_robust.yaml {{on}}
    {{train}} {{r}}/stage2_robust.yaml {{on}} out=out/demo_robust/stage2_quiet datasets.0.path=out/data/instructions_quiet
    {{python}} -m stages.evaluate {{r}}/evaluate_robust.yaml
    {{python}} -m stages.report {{r}}/report_robust.yaml

# the text of the demo's world, then speech to codes (training and test)
data: setup
    {{python}} recipes/demo/world.py recipes/demo/world.yaml
    {{python}} -m stages.tokenize_speech {{r}}/tokenize_train.yaml
    {{python}} -m stages.tokenize_speech {{r}}/tokenize_test.yaml

# speech to codes: just tokenize recipes/NAME/tokenize_train.yaml key=value ...
tokenize *args: setup
    {{python}} -m stages.tokenize_speech "$@"

# instruction text to spoken training data: choose and clean the text, then speak it
synthesize *args: setup
    @{{python}} recipes/verbs.py synthesize {{r}} "$@"

# hear a spoken dataset: a page with samples of every kind and their audio: just listen out/data/NAME
listen *args: setup
    {{python}} -m stages.listen "$@"

# check a finished artifact against its manifest: just verify out/data/NAME
verify *args: setup
    {{python}} -m stages.verify "$@"

# look at a dataset's codes: hours, use, entropy, lengths, rejects, plots: just inspect out/data/NAME
inspect *args: setup
    {{python}} -m stages.inspect_dataset "$@"

# put a finished dataset or model on the Hub: just push NAME [repo=OWNER/NAME private=false dry_run=true]
push *args: setup
    {{python}} -m stages.push_to_hub "$@"

# give the base model its sound tokens
expand *args: setup
    {{python}} -m stages.expand_vocab {{r}}/expand_vocab.yaml "$@"

# stage 1: next-token training on speech
stage1 *args: setup
    {{train}} {{r}}/stage1.yaml {{on}} "$@"

# stage 2: spoken instructions, transcription, text replay; first what stage 1 left must pass the gate (gate=false: unasked)
stage2 *args: setup
    @{{python}} recipes/verbs.py gate {{r}} gate={{gate}} "$@"
    {{train}} {{r}}/stage2.yaml {{on}} "$@"

# which row spoiled a step: just bisect-batch recipes/NAME/stage2.yaml 123
bisect-batch *args: setup
    {{python}} -m stages.bisect_batch "$@"

# score every epoch on every task, then the report: just recipe=NAME sweep [only=[stage2] limit=100 out=out/NAME/evals --dry-run]
sweep *args: setup
    @{{python}} recipes/verbs.py sweep {{r}} "$@"

# score the checkpoints: text multiple choice, spoken questions, transcription
evaluate *args: setup
    {{python}} -m stages.evaluate {{r}}/evaluate.yaml "$@"

# table, plots, page and the chosen epoch from the scores
report *args: setup
    {{python}} -m stages.report {{r}}/report.yaml "$@"

# whether a checkpoint is good enough for the next stage
gate *args: setup
    {{python}} -m stages.gate {{r}}/gate.yaml "$@"

# AudioBench's word error rate of a file of {"reference", "prediction"} lines: just score-wer FILE.jsonl
score-wer *args: setup
    {{python}} -m stages.score_wer "$@"

# answer a spoken question with the best epoch: just ask FILE.wav
ask *args: setup
    {{python}} -m stages.ask {{r}}/ask.yaml "$@"

# make a wav to ask with: just say "what is three plus four" [out.wav]
say *args: setup
    {{python}} recipes/demo/say.py {{r}}/say.yaml "$@"

# train the demo's quantizer again (30 minutes on one core)
train-quantizer *args: setup
    {{python}} recipes/demo/world.py recipes/demo/world.yaml
    {{python}} -m stages.train_quantizer {{r}}/train_quantizer.yaml "$@"

# train the demo's base model again (about 6 minutes on 2 cores)
train-base *args: setup
    {{python}} recipes/demo/world.py recipes/demo/world.yaml
    {{python}} recipes/demo/init_base.py {{r}}/init_base.yaml
    {{train}} {{r}}/train_base.yaml {{on}} "$@"
    {{python}} -m stages.evaluate {{r}}/evaluate.yaml only=[base] checkpoints.0.path=out/models/base_training/epoch_2 out=out/models/evals

# show that a promise holds: just prove demo | tokenize | synthesize | quantizer | resume | losses | preflight | pythons
prove what: setup
    @test -f tests/prove_{{what}}.py || (echo "error: there is no {{what}} to prove; choose" $(cd tests; ls prove_*.py | sed 's/prove_//; s/.py//') >&2; exit 2)
    PYTHONPATH=. {{python}} tests/prove_{{what}}.py

# measure speed: just bench tokenize [key=value ...]
bench what *args: setup
    @test -f tests/bench_{{what}}.py || (echo "error: there is no {{what}} to bench; choose" $(cd tests; ls bench_*.py | sed 's/bench_//; s/.py//') >&2; exit 2)
    PYTHONPATH=. {{python}} tests/bench_{{what}}.py "${@:2}"

# dist/gpu: what to copy to a machine with a GPU and no network, where `python3 run.py` measures for 8 minutes (at most 55 MB)
gpu-bundle: setup
    PYTHONPATH=. {{python}} tests/gpu_bundle.py

# all tests (about 5 minutes on 2 cores)
test *args: setup
    OMP_NUM_THREADS=1 {{python}} -m pytest -n 2 --dist loadfile "$@"

# WhisperSpeech in an environment of its own, .venv-whisperspeech (7 GB; a no-op when it is up to date)
setup-whisperspeech:
    @cmp -s requirements-whisperspeech.txt .venv-whisperspeech/requirements.txt || ( \
      python3 -m venv .venv-whisperspeech && .venv-whisperspeech/bin/python -m pip install --disable-pip-version-check -r requirements-whisperspeech.txt && \
      cp requirements-whisperspeech.txt .venv-whisperspeech/requirements.txt )

# WhisperSpeech's two routes, on its genuine classes with small random weights (skipped by `just test` without its environment)
test-whisperspeech *args: setup setup-whisperspeech
    OMP_NUM_THREADS=1 {{python}} -m pytest tests/test_whisperspeech_env.py "$@"

# lint and types
check: setup
    .venv/bin/ruff check . && .venv/bin/mypy
