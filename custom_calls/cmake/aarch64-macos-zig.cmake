# Cross-compiles for macOS on Apple silicon: zig's C++ compiler needs no Apple SDK.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
find_program(zig zig REQUIRED)
set(CMAKE_CXX_COMPILER "${zig}" c++)
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.13.0)
# Apple's install_name_tool is not needed, as nothing is installed from such a build.
set(CMAKE_INSTALL_NAME_TOOL true)
