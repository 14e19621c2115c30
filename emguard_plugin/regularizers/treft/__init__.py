"""TReFT: Token-Regularized Fine-Tuning, which holds the chat template's keys and values (arXiv 2606.06667)."""
