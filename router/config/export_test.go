package config

// Load is Loader.Load of the zero Loader.
func Load(path string) (*Config, error) { return Loader{}.Load(path) }

// Parse is Loader.Parse of the zero Loader.
func Parse(name string, data []byte) (*Config, error) { return Loader{}.Parse(name, data) }
