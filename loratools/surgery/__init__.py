"""What is done with adapters and models: one verb a file, or a folder where a verb needs more.

inspect, spectrum, compare, hash   look at them
find                               the adapters below a folder, by what they do
validate, verify                   check them
merge, unmerge, switch             change a model
folding                            adapters carried into bases whose weights are folded
dequantize                         a quantized model in 16 bit
quantization                       how a model is quantized, as `inspect` says it
combine, resize, extract, convert  make an adapter
edit                               what an adapter's files say about it
inputs, base, change               what a verb opens; whether it belongs to one base; what an adapter changes
sharing                            verbs on several processes or machines
paper                              what the LoRA paper measures, beside what `compare` does
"""
