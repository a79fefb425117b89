"""What a run is made of: configuration, presets, device, network, optimizer, step."""
