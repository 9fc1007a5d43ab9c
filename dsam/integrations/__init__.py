"""Methods inside other training loops; import what you use: `dsam.integrations.transformers`, `.distributed`."""
