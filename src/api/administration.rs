//! `thenar.v1.Administration`.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::convert::proto_duration;
use super::status::status;
use crate::api::proto;
use crate::service::Service;

/// The implementation of the service.
pub(super) struct Api(pub(super) Arc<Service>);

#[tonic::async_trait]
impl proto::administration_server::Administration for Api {
    async fn get_status(&self, _: Request<proto::GetStatusRequest>) -> Result<Response<proto::Status>, Status> {
        let s = self.0.status().await.map_err(|e| status(&e))?;
        let g = s.gallery;
        let small = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Ok(Response::new(proto::Status {
            version: env!("CARGO_PKG_VERSION").into(),
            dim: small(s.dim),
            templates: g.templates,
            subjects: s.counts.subjects,
            tombstones: g.tombstones,
            memory: Some(proto::MemoryStatus {
                mapped_bytes: g.mapped_bytes,
                index_bytes: g.index_bytes,
                engine_bytes: g.engine.host_bytes,
                device_bytes: g.engine.device_bytes,
                resident_anonymous_bytes: s.resident_anonymous_bytes,
            }),
            engine: Some(proto::EngineStatus {
                kind: g.engine.kind.into(),
                adapter: g.engine.adapter,
                threads: small(g.engine.threads),
                preferred: g.preferred,
            }),
            registry_lsn: g.registry_lsn.0,
            gallery_lsn: g.lsn.0,
            uptime: Some(proto_duration(s.uptime)),
            searches: s.searches,
            policies: s
                .policies
                .into_iter()
                .map(|(purpose, policy)| proto::PolicyStatus {
                    purpose: purpose.as_str().into(),
                    threshold: policy.threshold,
                    margin: policy.margin,
                })
                .collect(),
            opened_in: Some(proto_duration(g.opened.took)),
        }))
    }
}
