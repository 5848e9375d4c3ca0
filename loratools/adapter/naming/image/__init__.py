"""Names of the modules of image models, in every spelling in use, and the tables that lead from one to another.

components         the parts of a pipeline: a UNet or transformer, text encoders
patterns           names with numbers in them, looked up
families           one file a family: the original's names and diffusers', what is fused, who reads which
readings           whose names these are, and where each leads
groups             the image models that an adapter changes, and the names that readers want
models             the image model inside a base, and an adapter that is another one's
translate          updates renamed, taken apart, fused
one_file           the original's names as a checkpoint in one file has them
rename             a whole adapter under one spelling or the other
"""
