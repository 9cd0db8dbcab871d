"""The files in the folder of a training run that say what its network is, by name."""

STATE, TRAINING, PLAIN, RUN = "last.ckpt", "training.safetensors", "plain.safetensors", "run.json"
INT8 = "int8.onnx"
