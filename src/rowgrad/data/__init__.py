"""Reading data: bundled sets and files become a `Table`; splits, planted errors, standardized inputs. Never rows."""
