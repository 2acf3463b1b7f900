"""Training. For now one program, `dsv3.train.nano`, over the pieces that every stage shares."""
