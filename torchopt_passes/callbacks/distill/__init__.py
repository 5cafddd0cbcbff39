"""What `Distillation` is made of: losses, teachers, layers and their features, and the cache of a teacher's logits."""
