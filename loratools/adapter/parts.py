"""The names that PEFT gives the tensors of a module; all kinds and dialects use them."""

A, B, BIAS = "lora_A.weight", "lora_B.weight", "lora_B.bias"
A_EMBEDDING, B_EMBEDDING = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
