"""Models of Hugging Face, there and back: a folder that plain ``transformers`` loads."""
