"""Checkpoints of families that exist as code in their own repositories only, imported onto transformers' own classes.

A family is a config mapping, tensor rules and a tokenizer; nothing of a repository's code is ever imported. In the
order data flows through them:

- `json_file`: one JSON file of a checkpoint, read with types.
- `imported`: what a family's adapter makes of a checkpoint; `tensor_rules`: which tensors become which.
- `qwen`, `chatglm`, `baichuan`, `internlm`, `internlm2`: one family each; `registry` picks it.
- `tensor_conversions`: rules to `Conversion`s, for `checkpoint`.
- `byte_pairs`, `tiktoken_file`, `sentencepiece_model`, `tokenizer_hints`, `sentencepiece_tokenizer`,
  `chatglm_tokenizer`: vocabularies to ``tokenizer.json``; `companions` writes the small files of a shard directory.
"""
