"""What RoMo is compared with; nothing else in the project imports this package."""
