"""The networks: architectures as data (`variants`), layers, blocks, the network, its summary."""
