"""`tether demo`: a small chat model learns from pairs of its own answers, and what tells a good run from a ruined one.

`run` is the script, on the public API; `models` gets the model, `show` prints and draws. `train.jsonl` and
`held_out.jsonl` were made by `examples/demo_pairs.py`.
"""
