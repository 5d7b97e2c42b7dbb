"""The local server: TF Serving's REST and gRPC APIs, and a page for people."""
