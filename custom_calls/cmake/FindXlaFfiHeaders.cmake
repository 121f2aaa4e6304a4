# find_xla_ffi_headers(result): the folder that holds xla/ffi/api/ffi.h, or "" when there is none.
# Looks at GPT2_JAX_XLA_FFI_INCLUDE_DIR, then in the jaxlib of the Python that drives the build.
# find_spec finds jaxlib's folder without running any of jaxlib's (or jax's) code.
function(find_xla_ffi_headers result)
  set(folder "${GPT2_JAX_XLA_FFI_INCLUDE_DIR}")
  if(NOT folder)
    find_package(Python 3 QUIET COMPONENTS Interpreter)
    if(Python_Interpreter_FOUND)
      execute_process(
        COMMAND "${Python_EXECUTABLE}" -c
                "import importlib.util as u; print(u.find_spec('jaxlib').submodule_search_locations[0])"
        OUTPUT_VARIABLE jaxlib OUTPUT_STRIP_TRAILING_WHITESPACE
        ERROR_QUIET RESULT_VARIABLE status)
      if(status EQUAL 0)
        set(folder "${jaxlib}/include")
      endif()
    endif()
  endif()
  if(folder AND NOT EXISTS "${folder}/xla/ffi/api/ffi.h")
    set(folder "")
  endif()
  set(${result} "${folder}" PARENT_SCOPE)
endfunction()
