"""A worker for roots of Distributed-Llama: it computes the part of a model that a root describes and sends."""
