"""Modules that a model stores fused (qkv, gate and up): one adapter of several, and several of one."""
