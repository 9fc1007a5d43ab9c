"""Fine-tuning one model on one task with one method."""
