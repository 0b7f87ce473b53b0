"""HSWQ Loader: converted files as models whose weights stay quantized in memory."""
