"""Backbones: the zoo, cutting them in two, the engines that run the frozen part, the store that keeps its output."""
