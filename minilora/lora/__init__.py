"""The method: LoRA layers, put into any model of linear and embedding layers, and taken out again."""
