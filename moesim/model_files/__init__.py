"""Reading models from files: Hugging Face configs and GGUF headers."""
