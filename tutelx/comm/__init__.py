"""Many ranks: who owns which expert, and how tokens get there and back."""
