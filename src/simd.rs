//! Which instruction set the arithmetic kernels use, decided once for the process.
//!
//! Knows the processor and one environment variable. Does not know what the kernels compute.
//! Invariant: a [`Simd`] that came out of [`Simd::checked`] or [`chosen`] can run on this
//! processor; every dispatch to a `#[target_feature]` function relies on that.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

/// The environment variable that forces a path: `avx512vbmi`, `avx512bf16`, `avx512`, `avx2`
/// or `portable`.
pub const SIMD_VARIABLE: &str = "THENAR_SIMD";

/// A family of kernels, by the instructions it needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Simd {
    /// [`Simd::Avx512Bf16`] with VBMI and VNNI: Sapphire Rapids, Zen 4 and later.
    Avx512Vbmi,
    /// AVX-512 F, BW, DQ, VL and BF16: Cooper Lake.
    Avx512Bf16,
    /// AVX-512 F, BW, DQ and VL: every AVX-512 server since Skylake.
    Avx512,
    /// AVX2, FMA and F16C: x86 since Haswell and Zen.
    Avx2,
    /// Plain Rust that the compiler vectorises as it can. Runs anywhere.
    Portable,
}

/// Why a path cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimdError {
    /// The name is not a known code path.
    #[error(
        "{name:?} is not an instruction set Thenar knows; it knows avx512vbmi, avx512bf16, avx512, avx2 and portable"
    )]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The processor lacks instructions the path needs.
    #[error("this processor cannot run the {path} kernels; the best it can run is {best}")]
    Unavailable {
        /// What was asked for.
        path: Simd,
        /// What the processor can do.
        best: Simd,
    },
}

impl Simd {
    /// Every path, fastest first.
    pub const ALL: [Self; 5] = [Self::Avx512Vbmi, Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// The name used in [`SIMD_VARIABLE`] and on status pages.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Avx512Vbmi => "avx512vbmi",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Whether this processor (and its operating system) can run the path.
    #[must_use]
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = || {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            };
            let avx512 = || {
                avx2()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            };
            match self {
                Self::Avx512Vbmi => {
                    avx512()
                        && is_x86_feature_detected!("avx512bf16")
                        && is_x86_feature_detected!("avx512vbmi")
                        && is_x86_feature_detected!("avx512vnni")
                        && is_x86_feature_detected!("bmi2")
                }
                Self::Avx512Bf16 => avx512() && is_x86_feature_detected!("avx512bf16"),
                Self::Avx512 => avx512(),
                Self::Avx2 => avx2(),
                Self::Portable => true,
            }
        }
        #[cfg(not(target_arch = "x86_64"))]
        {
            self == Self::Portable
        }
    }

    /// The fastest path this processor can run.
    #[must_use]
    pub fn best() -> Self {
        Self::ALL.into_iter().find(|path| path.is_available()).unwrap_or(Self::Portable)
    }

    /// The path itself, if this processor can run it.
    ///
    /// # Errors
    /// [`SimdError::Unavailable`] if it cannot.
    pub fn checked(self) -> Result<Self, SimdError> {
        if self.is_available() { Ok(self) } else { Err(SimdError::Unavailable { path: self, best: Self::best() }) }
    }
}

impl fmt::Display for Simd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Simd {
    type Err = SimdError;

    fn from_str(name: &str) -> Result<Self, SimdError> {
        Self::ALL
            .into_iter()
            .find(|path| path.as_str() == name)
            .ok_or_else(|| SimdError::Unknown { name: name.to_owned() })
    }
}

/// The path of this process: what [`SIMD_VARIABLE`] asks for, or the best the processor has.
/// Read once; a later change of the variable has no effect.
///
/// # Errors
/// [`SimdError`] if the variable names no path, or one that the processor lacks.
pub fn chosen() -> Result<Simd, SimdError> {
    static CHOSEN: OnceLock<Result<Simd, SimdError>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| match std::env::var_os(SIMD_VARIABLE) {
            None => Ok(Simd::best()),
            Some(name) => from_variable(&name.to_string_lossy()),
        })
        .clone()
}

/// What a value of [`SIMD_VARIABLE`] means: an empty one asks for nothing.
fn from_variable(value: &str) -> Result<Simd, SimdError> {
    if value.is_empty() {
        return Ok(Simd::best());
    }
    value.parse::<Simd>()?.checked()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_parses_back_to_its_path() {
        for path in Simd::ALL {
            assert_eq!(path.as_str().parse(), Ok(path));
        }
    }

    #[test]
    fn an_unknown_name_is_refused_with_the_names_that_are_known() {
        let error = from_variable("sse9").unwrap_err();
        assert_eq!(error, SimdError::Unknown { name: "sse9".to_owned() });
        assert!(error.to_string().contains("portable"), "{error}");
    }

    #[test]
    fn a_path_is_taken_exactly_when_the_processor_has_it() {
        for path in Simd::ALL {
            let taken = from_variable(path.as_str());
            if path.is_available() {
                assert_eq!(taken, Ok(path));
            } else {
                let error = taken.unwrap_err();
                assert!(error.to_string().contains(path.as_str()), "{error}");
                assert!(error.to_string().contains(Simd::best().as_str()), "{error}");
            }
        }
        assert!(Simd::Portable.is_available());
        assert_eq!(from_variable(""), Ok(Simd::best()));
    }
}
