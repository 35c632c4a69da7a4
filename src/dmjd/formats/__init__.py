"""Exports to the formats of other programs; each file is compared with the original network before it gets its name.

network         the network of one of our files, and the comparison of exports with it
timm_file       weights that timm loads
hub_folder      a folder for timm, transformers and the Hugging Face hub, with a model card
onnx_graph      a graph for ONNX runtimes; needs the extra `onnx`
torch_program   a program of torch.export
"""
