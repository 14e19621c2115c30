"""The Axolotl side: the only folder that imports axolotl."""
