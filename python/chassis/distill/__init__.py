"""Cross-tokenizer distillation: text and two tokenizations -> alignment and projection -> loss -> a trained student."""
