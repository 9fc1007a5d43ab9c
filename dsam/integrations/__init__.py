"""Methods inside other people's training loops. Import what you use: `dsam.integrations.transformers` or `.distributed`."""
