"""Post-training of language models on a world small enough to be exact.

One file a topic: `tokens`, `models`, `generate`, `sft`, `reward`, `ppo`, `dpo`, `exact`, `evaluate`, `world`,
`data`, `pipeline`. This file imports none of them, so `import cs336_alignment` costs nothing.
"""

__version__ = "0.1.0"
