"""The local server: the REST and gRPC APIs of TF Serving, and a web page."""
