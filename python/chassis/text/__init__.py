"""Text before any model sees it: documents and their splits, the bytes of tokens, alignment of tokenizations."""
