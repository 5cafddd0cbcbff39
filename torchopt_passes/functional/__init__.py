"""Pure maths on tensors: no graph, no training loop. Import the module you need."""
