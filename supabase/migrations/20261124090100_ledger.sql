-- The books: usage records (the journal), credit transactions and the audit log. What was written stays written.

create table public.usage_records (
    request_id uuid primary key,
    client_request_id varchar(256),
    user_id bigint not null references public.users (id),
    key_id bigint not null references public.api_keys_new (id),
    mode text not null,
    environment text not null,
    endpoint text not null,
    model text not null,
    model_used text,
    provider text,
    prompt_estimate bigint not null default 0,
    output_granted bigint not null default 0,
    prompt_tokens bigint,
    completion_tokens bigint,
    cached_tokens bigint,
    reasoning_tokens bigint,
    hold_nanos bigint not null,
    upstream_cost_nanos bigint,
    cost_nanos bigint not null default 0,
    overrun_nanos bigint not null default 0,
    markup numeric not null,
    status text not null default 'pending',
    settlement_source text,
    finish_reason text,
    error_code text,
    streamed boolean not null default false,
    latency_ms bigint,
    time_to_first_token_ms bigint,
    generation_id varchar(256),
    created_at timestamptz not null,
    expires_at timestamptz not null,
    settled_at timestamptz
) with (fillfactor = 40);

-- What holds of every record. One function, because PostgreSQL reads the text of a table's checks anew for every statement: as a dozen
-- checks these rules took a quarter of the time of admission and settlement.
create function public.is_sound_record(r public.usage_records) returns boolean language plpgsql immutable as $$
begin
    return least(r.prompt_estimate, r.output_granted, r.hold_nanos, r.upstream_cost_nanos, r.cost_nanos, r.overrun_nanos) >= 0
        and r.markup > 0
        and r.mode in ('sandbox', 'live')
        and r.environment in ('live', 'test', 'staging', 'development')
        and case r.status
            when 'pending' then r.settled_at is null and r.settlement_source is null and r.cost_nanos = 0
            else r.status in ('completed', 'failed', 'cancelled', 'expired') and r.settled_at is not null
                 and coalesce(r.settlement_source in ('usage', 'generation', 'none'), false)
        end;
end $$;
revoke all on function public.is_sound_record(public.usage_records) from public, anon, authenticated;
grant execute on function public.is_sound_record(public.usage_records) to service_role;
alter table public.usage_records add constraint usage_records_sound check (public.is_sound_record(usage_records));
comment on constraint usage_records_sound on public.usage_records is
    'No negative amount; pending without an end and a cost, settled with both.';
comment on table public.usage_records is
    'One row per admitted request: pending with its hold, then finished by settlement. No index may mention what settlement changes, '
    'or updates stop being heap-only; a settled row is longer, and 40 leaves room for a page whose rows are settled in one transaction.';
create index usage_records_user_idx on public.usage_records (user_id, created_at desc);
create index usage_records_key_idx on public.usage_records (key_id, created_at);
create index usage_records_expiry_idx on public.usage_records using brin (expires_at) with (pages_per_range = 16);
comment on index public.usage_records_expiry_idx is 'The sweep''s way to expired holds; records arrive in this order.';
alter table public.usage_records enable row level security;
revoke all on public.usage_records from public, anon, authenticated, service_role;
grant select, insert, update on public.usage_records to service_role;

create table public.credit_transactions (
    id bigint generated always as identity primary key,
    user_id bigint not null references public.users (id),
    kind text not null check (kind in ('grant', 'purchase', 'refund', 'adjustment', 'expiry')),
    amount_nanos bigint not null check (amount_nanos <> 0),
    balance_after_nanos bigint not null check (balance_after_nanos >= 0),
    payment_method text check (payment_method in ('mastercard', 'paca_token')),
    request_id uuid references public.usage_records (request_id),
    idempotency_key text check (length(idempotency_key) between 1 and 255),
    actor text not null,
    reason text not null default '' check (length(reason) <= 500),
    created_at timestamptz not null default clock_timestamp(),
    constraint credit_transactions_sign check (
        case kind when 'grant' then amount_nanos > 0 when 'purchase' then amount_nanos > 0 when 'refund' then amount_nanos > 0
                  when 'expiry' then amount_nanos < 0 else true end
    ),
    constraint credit_transactions_refund_names_request check ((kind = 'refund') = (request_id is not null))
);
comment on table public.credit_transactions is 'Every change of credits that is not the charge of a request.';
create unique index credit_transactions_idempotency_key on public.credit_transactions (idempotency_key);
comment on index public.credit_transactions_idempotency_key is 'The same order twice is one transaction.';
create index credit_transactions_user_idx on public.credit_transactions (user_id, id desc);
create index credit_transactions_request_idx on public.credit_transactions (request_id) where request_id is not null;
alter table public.credit_transactions enable row level security;
revoke all on public.credit_transactions from public, anon, authenticated, service_role;
grant select, insert on public.credit_transactions to service_role;
revoke all on sequence public.credit_transactions_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.credit_transactions_id_seq to service_role;

create table public.audit_logs (
    id bigint generated always as identity primary key,
    actor text not null,
    action text not null,
    target text,
    user_id bigint references public.users (id),
    key_id bigint references public.api_keys_new (id),
    ip inet,
    user_agent text check (length(user_agent) <= 512),
    request_id uuid,
    details jsonb not null default '{}' check (jsonb_typeof(details) = 'object'),
    -- Set for refusals only: the same refusal of the same subject within a minute is one row with a count.
    refusal_minute timestamptz,
    occurrences bigint not null default 1 check (occurrences > 0),
    created_at timestamptz not null default clock_timestamp()
);
create unique index audit_logs_refusal_key on public.audit_logs (actor, action, refusal_minute) where refusal_minute is not null;
create index audit_logs_user_idx on public.audit_logs (user_id, id desc);
create index audit_logs_key_idx on public.audit_logs (key_id, id desc);
alter table public.audit_logs enable row level security;
revoke all on public.audit_logs from public, anon, authenticated, service_role;
grant select, insert, update on public.audit_logs to service_role;
revoke all on sequence public.audit_logs_id_seq from public, anon, authenticated, service_role;
grant usage, select on sequence public.audit_logs_id_seq to service_role;

create function public.refuse_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception '% is append-only: % is refused', tg_table_name, lower(tg_op) using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_change() from public, anon, authenticated;
grant execute on function public.refuse_change() to service_role;

create trigger credit_transactions_append_only before update or delete on public.credit_transactions
    for each row execute function public.refuse_change();
create trigger credit_transactions_no_truncate before truncate on public.credit_transactions
    for each statement execute function public.refuse_change();
create trigger usage_records_never_deleted before delete on public.usage_records
    for each row execute function public.refuse_change();
create trigger usage_records_no_truncate before truncate on public.usage_records
    for each statement execute function public.refuse_change();
create trigger audit_logs_never_deleted before delete on public.audit_logs
    for each row execute function public.refuse_change();
create trigger audit_logs_no_truncate before truncate on public.audit_logs
    for each statement execute function public.refuse_change();

-- A settled record is frozen; only one that was settled without knowing the cost may be amended, once, by what the upstream says.
create function public.refuse_thaw() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.settlement_source = 'none' and new.settlement_source in ('usage', 'generation')
       and (new.request_id, new.user_id, new.key_id, new.hold_nanos, new.markup, new.created_at)
           is not distinct from (old.request_id, old.user_id, old.key_id, old.hold_nanos, old.markup, old.created_at) then
        return new;
    end if;
    raise exception 'usage record % is settled and frozen', old.request_id using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_thaw() from public, anon, authenticated;
grant execute on function public.refuse_thaw() to service_role;
create trigger usage_records_frozen before update on public.usage_records
    for each row when (old.status <> 'pending') execute function public.refuse_thaw();

create function public.refuse_identity_change() returns trigger language plpgsql set search_path = '' as $$
begin
    raise exception 'usage record %: who, when and how much was held never changes', old.request_id using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_identity_change() from public, anon, authenticated;
grant execute on function public.refuse_identity_change() to service_role;
create trigger usage_records_identity before update of request_id, user_id, key_id, mode, environment, hold_nanos, markup, created_at
    on public.usage_records for each row execute function public.refuse_identity_change();

-- Of an audit row only the count of a repeated refusal may grow.
create function public.refuse_audit_change() returns trigger language plpgsql set search_path = '' as $$
begin
    if old.refusal_minute is not null and new.occurrences > old.occurrences
       and to_jsonb(new) - 'occurrences' = to_jsonb(old) - 'occurrences' then
        return new;
    end if;
    raise exception 'audit_logs is append-only: update is refused' using errcode = 'restrict_violation';
end $$;
revoke all on function public.refuse_audit_change() from public, anon, authenticated;
grant execute on function public.refuse_audit_change() to service_role;
create trigger audit_logs_append_only before update on public.audit_logs
    for each row execute function public.refuse_audit_change();
