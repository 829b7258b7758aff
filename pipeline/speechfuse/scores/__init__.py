"""Pure numbers, no model: word errors, metrics, judge, intervals."""

COMPONENTS = {  # name in YAML, below speechfuse.scores: where it stands
    "BlogJudge": "judge.BlogJudge",
    "Judge": "judge.Judge",
}
