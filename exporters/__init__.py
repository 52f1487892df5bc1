"""From a torch network to the `.onnx` file that ships: exported, simplified, quantized, stamped.

to_onnx.py    a torch module or exported program → one float ONNX file, opset 18
simplify.py   onnxsim in a child process, kept only if the outputs agree on real samples
rewrites.py   the graph rewrites of our own: BatchNormalization folded, means pooled
text_rewrites.py, text_inputs.py   those of text encoders: flat tokens, one Gelu, a short mask
calibrate.py  the range of every activation, from real samples
equalize.py   cross-layer equalization, exact before rounding
int8.py       a float graph and ranges → static int8 (QDQ) by onnxruntime.quantization
text_policy.py what becomes int8 in a text encoder, and what is done to keep the rest float
embedding.py  word embeddings as int8 rows
dynamic_int8.py dynamic int8: scales of activations found at run time
int8_check.py holds what was written against what was asked for
float_guard.py keeps float what onnxruntime would make int8 by itself
bias.py       bias correction of an int8 graph
engagement.py which nodes run as int8 kernels, from the graph that onnxruntime runs
optimized.py  that graph, and the time of its nodes
unfused.py    why a node stays float
saturation.py pair sums that saturate on x86 without VNNI
stamp.py      what runs on `min_runtime`, names nobody's files, and carries the user's metadata
sessions.py   onnxruntime sessions, opened and run one way everywhere
feeds.py      what a session is fed with: images, or a row of tokens an input
reference.py  what torch itself computes, in float64 and float32
compare.py    how far two sets of logits are apart
audit.py      parameters, multiply-adds, bytes and operators, read from the graph
graph.py      small questions about a ModelProto, shared by the files above
quiet.py      keeps other libraries' talk off the terminal

Everything here takes and returns tensors, arrays, graphs and paths. Nothing knows recipes,
stages or reports; those stand above, in `pipeline`.
"""
