"""The computational graph behind a loss, as a dynamic program sees it: vector variables joined by local derivatives."""
