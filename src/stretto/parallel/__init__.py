"""Plans applied to models: attention modules are bound to a mesh and a plan, reversibly."""
