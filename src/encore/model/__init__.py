"""The models: single-device and plain. Parallelism, quantisation and adapters are surgeries done from outside."""
