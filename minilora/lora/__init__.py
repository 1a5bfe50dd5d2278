"""The method: LoRA put into any model of linear and embedding layers, and taken out again."""
