"""What `tutelx demo` shows: a small MoE language model, trained as written and wrapped. Only the CLI imports it."""
