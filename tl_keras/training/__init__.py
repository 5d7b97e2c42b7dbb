"""Training in Keras: heads on stored embeddings, tails on stored feature maps, whole networks on stored pixels."""
