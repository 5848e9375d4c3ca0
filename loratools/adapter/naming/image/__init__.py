"""Names of the modules of image models, in every spelling in use, and the tables that lead from one to another.

components         the parts of a pipeline: a UNet or transformer, text encoders
architectures      the module names of known models, from the lists in `_keys`: how a flattened name finds its dots
stable_diffusion   the UNet of Stable Diffusion 1, 2 and SDXL: the original's names and diffusers'
flux               Flux.1: the original's names and diffusers', and which modules are fused
families           one file a family: the original's names and diffusers', what is fused, who reads which
rename             an adapter under one spelling or the other
"""
