"""The one room that knows DeepSpeed's insides: set-up, fragments, gradients, forward copies of the teacher."""
