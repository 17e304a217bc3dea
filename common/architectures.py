"""stub, replaced by the other branch"""
from transformers import AutoConfig, GPT2Config, MistralConfig, LlamaConfig, Qwen2Config
KNOWN = {"openai-community/gpt2": GPT2Config(), "mistralai/Mistral-7B-v0.1": MistralConfig(hidden_size=4096,intermediate_size=14336,num_hidden_layers=32,num_attention_heads=32,num_key_value_heads=8,vocab_size=32000,max_position_embeddings=32768),
 "Qwen/Qwen2.5-0.5B": Qwen2Config(hidden_size=896,intermediate_size=4864,num_hidden_layers=24,num_attention_heads=14,num_key_value_heads=2,vocab_size=151936,tie_word_embeddings=True)}
def model_config(source):
    return KNOWN.get(source) or AutoConfig.from_pretrained(source)
